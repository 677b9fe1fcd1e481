"""The indexes that are served: a catalog that follows their generations, and the jobs that write new ones."""
