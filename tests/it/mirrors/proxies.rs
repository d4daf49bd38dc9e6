//! Errors of proxies name the proxy.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;

use crate::common::closed_port::ClosedPort;
use crate::common::ocifs::Ocifs;

/// Starts a proxy that answers every request with this status. Returns its address.
fn proxy(status: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            // Ends with the request, or with the connection.
            while lines.next().is_some_and(|line| line.is_ok_and(|line| !line.is_empty())) {}
            let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            if let Err(error) = stream.write_all(answer.as_bytes()) {
                eprintln!("the client has gone: {error}");
            }
        }
    });
    address
}

#[test]
fn a_proxy_that_refuses_is_named() {
    let closed = ClosedPort::new();
    let closed = closed.address().to_string();
    for (address, scheme, words) in [
        (closed.clone(), "https", &["no connection to the proxy"][..]),
        (closed, "http", &["no connection to the proxy"]),
        (
            proxy("403 Forbidden"),
            "https",
            &["the proxy", "does not connect to it"],
        ),
        (proxy("403 Forbidden"), "http", &["by way of the proxy", "403"]),
        (
            proxy("407 Proxy Authentication Required"),
            "https",
            &["the proxy", "wants a login"],
        ),
        (
            proxy("407 Proxy Authentication Required"),
            "http",
            &["the proxy", "wants a login"],
        ),
        (proxy("502 Bad Gateway"), "http", &["by way of the proxy", "502"]),
    ] {
        let url = format!("http://me:s3cret@{address}");
        let mut ocifs = Ocifs::with(&["--timeout", "3s"])
            .env("HTTPS_PROXY", &url)
            .env("HTTP_PROXY", &url);
        if scheme == "http" {
            ocifs = ocifs.options(&["--plain-http"]);
        }
        let error = ocifs.fails(["inspect", "registry.test:8080/app:1"]);
        assert!(error.contains(&address), "{scheme} {address}: {error}");
        for word in words {
            assert!(error.contains(word), "{scheme} {word}: {error}");
        }
        assert!(
            error.contains("registry.test:8080") && !error.contains("s3cret"),
            "{error}"
        );
    }
}
