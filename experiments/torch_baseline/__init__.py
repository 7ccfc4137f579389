"""LLMEraser on transformers, PEFT and PyTorch: an independent implementation to compare with."""
