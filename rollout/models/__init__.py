"""Model families over one shared decoder, their weight map, and the loaders."""
