"""Where text comes from (`readers`), where it is cut (`segment`), and the scored corpus on disk (`scored`)."""
