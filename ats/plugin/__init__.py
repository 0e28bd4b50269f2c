"""`ats.patch`: adaptive token sampling in models of timm and Hugging Face transformers."""
