"""A cluster with its OpenAI server: in one process (`cluster_server`), or in several (`supervising`)."""
