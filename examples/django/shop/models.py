"""What the shop has."""

from typing import ClassVar

from django.db import models

from tracevault.integrations.django import audited


class Tag(models.Model):
    name = models.CharField(max_length=100)


@audited(exclude=["seen"])
class Product(models.Model):
    name = models.CharField(max_length=100)
    price = models.DecimalField(max_digits=10, decimal_places=2)
    seen = models.IntegerField(default=0)
    tags: ClassVar = models.ManyToManyField(Tag)
