"""The SGLang adapter: the same policy inside an SGLang worker, by SGLang's own plugin door."""
