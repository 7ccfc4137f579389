"""What preconditioners and approximate inverses are worth on a real LoRA problem."""
