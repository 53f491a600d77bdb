"""Tokenizers, chat templates and streaming decoders."""
