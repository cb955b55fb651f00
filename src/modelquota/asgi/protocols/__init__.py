"""The protocols of inference servers, one file each: how to read a request."""
