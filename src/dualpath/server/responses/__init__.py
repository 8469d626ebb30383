"""OpenAI's Responses API: a body becomes a chat (`request`), its answer a response (`answer`), kept in `store`."""
