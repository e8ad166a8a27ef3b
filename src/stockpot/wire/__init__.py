"""HTTP: shapes in, shapes out, no policy."""
