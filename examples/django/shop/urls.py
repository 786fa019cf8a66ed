"""What the shop answers to."""

import json
from decimal import Decimal

from django.contrib import admin
from django.contrib.auth import authenticate, login
from django.db import transaction
from django.http import HttpRequest, JsonResponse
from django.urls import include, path

from shop.models import Product
from tracevault.integrations.django import aemit, emit
from tracevault.integrations.django.viewer import viewer_urls
from tracevault.web import Access


def index(_request: HttpRequest) -> JsonResponse:
    return JsonResponse({"try": "POST /login, then PUT /products/1"})


def enter(request: HttpRequest) -> JsonResponse:
    given = json.loads(request.body)
    user = authenticate(request, username=given["username"], password=given["password"])
    if user is None:
        emit("login.failed", data={"username": given["username"], "outcome": "failure"})
        return JsonResponse({}, status=401)
    login(request, user)
    emit("login")  # the actor is known from here on
    return JsonResponse({"welcome": user.get_username()})


def product(request: HttpRequest, id: int) -> JsonResponse:  # noqa: A002
    price = Decimal(json.loads(request.body)["price"])
    try:
        with transaction.atomic():
            found = Product.objects.select_for_update().get(pk=id)
            found.price = price
            found.save()  # an event: which fields have changed, and from what
            emit("price.approved", target={"id": str(id), "type": "product"})  # in the same transaction
            if price < 0:
                raise ValueError("no price is below nothing")
    except ValueError as error:
        emit("price.denied", data={"price": price, "why": str(error)})  # after the rollback, so it stays
        return JsonResponse({"error": str(error)}, status=422)
    return JsonResponse({"price": str(price)})


async def visit(_request: HttpRequest) -> JsonResponse:
    await aemit("shop.visited")
    return JsonResponse({})


def authorize(request: HttpRequest) -> Access | None:
    user = request.user
    return Access(actor={"id": str(user.pk), "type": "user"}) if user.is_staff else None


urlpatterns = [
    path("", index),
    path("login", enter),
    path("products/<int:id>", product),
    path("visit", visit),
    path("admin/", admin.site.urls),
    path("audit/", include(viewer_urls(authorize))),
]
