"""GGUF, the file of llama.cpp and Ollama: our codes written into it as they are."""
