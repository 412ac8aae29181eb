"""The way to a server: the proxy and the certificates that the environment names.

The variables are those that curl and Python's urllib read: http_proxy, https_proxy, all_proxy and no_proxy, in small or
large letters, SSL_CERT_FILE and SSL_CERT_DIR. What is wrong with one is an error that names it, before any work.
"""

import os
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from ipaddress import ip_address, ip_network
from urllib.request import getproxies

import httpx2
from huggingface_hub import constants

from customized_grpo.errors import UserError

SCHEMES = ("http", "https", "socks5", "socks5h")
"""Of proxies."""
NO_LIMITS = httpx2.Limits()
"""How many questions are under way at once is the caller's to say."""


@dataclass(frozen=True)
class Route:
    """A way to a server: directly, or through a proxy that an environment variable names."""

    proxy: httpx2.Proxy | None = None
    variable: str | None = None

    def words(self) -> str:
        """Return the way in words, for messages about a connection that fails; empty for the direct one."""
        return f", through the proxy that {self.variable} names" if self.variable else ""


def parsed_address(field: str, url: str) -> httpx2.URL:
    """Parse the `url` of the configuration field. Raises `UserError` where it is no http address."""
    try:
        address = httpx2.URL(url)
        if address.scheme not in ("http", "https"):
            raise ValueError("neither http nor https")
        _check_host(address)
    except (httpx2.InvalidURL, ValueError) as error:
        raise UserError(f"{field}: {url!r} is no address ({error}); expected http://host:port/path") from error
    return address


def route_to(address: httpx2.URL) -> Route:
    """Find the way to a server. Raises `UserError`, naming the variable, for a proxy that cannot be used."""
    proxies = getproxies()
    scheme = next((scheme for scheme in (address.scheme, "all") if proxies.get(scheme)), None)
    port = address.port or (443 if address.scheme == "https" else 80)
    if scheme is None or _is_local(address.host) or _is_exempt(address.host, port, proxies.get("no", "")):
        return Route()
    return _through(scheme, proxies[scheme])


def check_hub() -> None:
    """Raise `UserError`, naming the variable, where the client of the Hugging Face hub cannot be made: it reads all
    proxies of the environment, and fails on any that it cannot use."""
    if constants.HF_HUB_OFFLINE:
        return
    proxies = getproxies()
    if "*" not in (entry.strip() for entry in proxies.get("no", "").split(",")):
        for scheme in ("http", "https", "all"):
            if proxies.get(scheme):
                _through(scheme, proxies[scheme])
    _certificates()


def open_client(address: httpx2.URL, route: Route, headers: dict[str, str]) -> httpx2.Client:
    """Make the client of one server. Raises `UserError` where the environment's certificates cannot be read."""
    through = route.proxy.url.scheme if route.proxy else "http"
    # Without TLS no certificate is looked at, and reading them all takes a while.
    trusted = _certificates() if "https" in (address.scheme, through) else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return httpx2.Client(headers=headers, verify=trusted, proxy=route.proxy, trust_env=False, limits=NO_LIMITS)


def _through(scheme: str, url: str) -> Route:
    """Return the way through the proxy that is named for a scheme."""
    names = (f"{scheme}_proxy", f"{scheme}_proxy".upper())
    variable = next((name for name in names if os.environ.get(name) == url), f"{scheme}_proxy (of the system)")
    return Route(_proxy(variable, url if "://" in url else f"http://{url}"), variable)


def _proxy(variable: str, url: str) -> httpx2.Proxy:
    shown = re.sub(r"//.*@", "//(not shown)@", url)
    try:
        proxy = httpx2.Proxy(url)
        _check_host(proxy.url)
    except (httpx2.InvalidURL, ValueError) as error:
        scheme = url.partition("://")[0]
        found = f"{scheme} is no kind of proxy that is known" if scheme not in SCHEMES else "it is no address"
        raise UserError(
            f"{variable}: the environment variable is to name a proxy, and {found} (found {shown!r}); expected "
            f"{', '.join(f'{name}://host:port' for name in SCHEMES)}; correct it, unset it, or name the server in "
            "NO_PROXY"
        ) from error
    if proxy.url.scheme.startswith("socks") and find_spec("socksio") is None:
        raise UserError(
            f"{variable}: the environment variable names a SOCKS proxy ({shown}), which needs the package socksio; "
            "install it with: pip install 'customized-grpo[socks]'; or unset the variable, or name the server in "
            "NO_PROXY"
        )
    return proxy


def _check_host(address: httpx2.URL) -> None:
    """Raise ValueError for what the parser takes, and no connection can be made to."""
    if not address.host or "%" in address.host:
        raise ValueError("no host")
    if not 0 < (address.port or 80) < 2**16:
        raise ValueError(f"no port {address.port}")


def _certificates() -> ssl.SSLContext:
    """Return the certificates to trust: those that SSL_CERT_FILE or SSL_CERT_DIR names, else the system's."""
    loaders: dict[str, Callable[[str], ssl.SSLContext]] = {
        "SSL_CERT_FILE": lambda path: ssl.create_default_context(cafile=path),
        "SSL_CERT_DIR": lambda path: ssl.create_default_context(capath=path),
    }
    for variable, load in loaders.items():
        path = os.environ.get(variable)
        if not path:
            continue
        try:
            if variable == "SSL_CERT_DIR" and not os.path.isdir(path):
                raise NotADirectoryError("no folder")
            return load(path)
        except OSError as error:  # an SSLError is one
            what = "a file of certificates (PEM)" if variable == "SSL_CERT_FILE" else "a folder of certificates"
            reason = error.strerror or str(error) or type(error).__name__
            raise UserError(
                f"{variable}: the environment variable names {path!r}, which cannot be read as {what} ({reason}); "
                "correct it, or unset it to trust the system's"
            ) from error
    return httpx2.create_ssl_context(trust_env=False)


def _is_local(host: str) -> bool:
    """Return whether a host is this machine: no proxy can reach it."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _is_exempt(host: str, port: int, entries: str) -> bool:
    """Return whether NO_PROXY names a host: `*`, itself, a domain above it, or its network, with or without a port."""
    for entry in (entry.strip().lower().split("://")[-1] for entry in entries.split(",")):
        found = re.fullmatch(r"\[(.+)\](?::(\d+))?|([^:]+)(?::(\d+))?", entry)
        name, wanted = (found[1] or found[3], found[2] or found[4]) if found else (entry, None)
        if name == "*":
            return True
        domain = name.removeprefix("*").removeprefix(".")
        named = bool(domain) and (host == domain or host.endswith(f".{domain}"))
        if (named or _in_network(host, name)) and (wanted is None or int(wanted) == port):
            return True
    return False


def _in_network(host: str, network: str) -> bool:
    try:
        return ip_address(host) in ip_network(network, strict=False)
    except ValueError:
        return False
