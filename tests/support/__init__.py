"""What tests share: processes, tiny models, fakes, and the launcher of gloo ranks."""
