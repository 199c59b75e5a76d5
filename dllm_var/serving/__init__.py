"""A server with OpenAI's API: one thread decodes, and requests join and leave its batches between forwards."""
