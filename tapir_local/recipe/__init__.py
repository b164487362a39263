"""The settings of a distillation: schema, parsing, validation and comparison."""
