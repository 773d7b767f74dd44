"""Networks of the cascade: tensor to tensor, no files, no noise schedules."""
