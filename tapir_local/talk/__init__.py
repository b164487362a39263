"""A finished run in use: a conversation, a server, its rows as a dataset, and a person as a second judge."""
