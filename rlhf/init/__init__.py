"""A folder of configs for a user's own data, sized for the data and the machine."""
