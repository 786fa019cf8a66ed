"""A shop with Django: who changed what, in the same transaction as the change.

pip install "tracevault[django,binary]"
DATABASE_URL_WRITE=postgresql://... python manage.py migrate
DATABASE_URL_WRITE=postgresql://... python manage.py runserver
"""

import os
import sys

from django.core.management import execute_from_command_line

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "shop.settings")
    execute_from_command_line(sys.argv)
