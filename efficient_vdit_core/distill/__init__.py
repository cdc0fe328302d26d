"""Few steps and few tiles, learnt: consistency distillation (stage 1), knowledge distillation (stage 3), their
trainer."""
