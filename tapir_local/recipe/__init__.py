"""Every setting of a distillation: its name, type, default and help; read, checked and compared."""
