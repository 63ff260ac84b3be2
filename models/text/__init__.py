"""Recurrent networks that read text: the encoder, the language model, and the classifier that share it."""
