"""Interventions: a model without some of its experts, or with another number of them per token; what each is worth."""
