"""Networks for teachers and students alike; nothing here knows about distillation."""
