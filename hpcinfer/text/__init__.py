"""Text and token ids: tokenizer, text as tokens arrive, chat templates."""
