"""A model behind HTTP, as OpenAI's API: requests, one thread that answers them, and the app."""
