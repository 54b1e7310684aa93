"""An HTTP server for one model, in the words of OpenAI's API and of Ollama's, with a page."""
