from bdprune.report.base import Documents, Style, Writer, kind_of, names, writer, writer_of_file
from bdprune.report.fragment import html_fragment
from bdprune.report.overview import Overview
from bdprune.report.summary import percent, seconds, size
from bdprune.report.svg import Axes, Bar, bars
from bdprune.report.writers.html import Table, html_page
from bdprune.report.writers.text import plain, table
