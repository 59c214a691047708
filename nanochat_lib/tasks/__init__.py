"""Tasks: conversations to train on and questions to be graded, exported from lesson 09."""
