"""Properties: what a model must (not) do. A new kind is a new module here and a section of the spec."""
