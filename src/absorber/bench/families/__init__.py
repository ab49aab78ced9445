"""Families of sequence models on equal footing: trained from scratch on the same tokens, and measured alike."""
