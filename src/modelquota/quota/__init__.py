"""The quotas: the limits of a model as plain values, validated once."""
