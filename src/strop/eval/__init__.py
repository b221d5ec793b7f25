"""Looking at finished models: Hugging Face directories in, numbers out. No trainer, no ranks."""
