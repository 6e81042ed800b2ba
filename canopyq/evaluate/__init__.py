"""How good and how fast a model is: perplexity, KL and answers, chats, generation, benchmarks, the machine itself."""
