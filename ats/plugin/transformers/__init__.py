"""Hugging Face transformers' vision transformers with adaptive token sampling."""
