"""How well the doctor names causes, on conversations that were broken on purpose."""
