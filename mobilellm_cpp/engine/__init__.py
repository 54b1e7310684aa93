"""What runs a model: the one import of llama_cpp, the model as a Python object, conversations."""
