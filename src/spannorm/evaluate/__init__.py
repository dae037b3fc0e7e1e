"""How well a trained model answers questions: EleutherAI's lm-eval, and questions made from the user's own text."""
