from bdprune.report.html import Table, html_page
from bdprune.report.summary import percent, seconds
from bdprune.report.svg import Bar, bars
from bdprune.report.text import plain, table
