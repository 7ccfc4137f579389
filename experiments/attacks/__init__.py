"""What attackers tell of models that forgot."""
