//! The operators' listener (off by default, on an address of its own): plain HTTP, read-only.
//!
//! | path | answer |
//! | --- | --- |
//! | `/metrics` | counters and histograms for Prometheus |
//! | `/healthz` | 200 while the event loop runs |
//! | `/readyz` | 200 while every storage takes what it is configured to take; else 503 and why |
//! | `/status.json` | everything the page shows |
//! | `/` | a page for people: storages, clients, who holds locks, a pack in progress |
//!
//! It knows no other method than GET and HEAD, and never reads a body. A slow or hostile peer costs one of
//! [`MAX_CONNECTIONS`] for at most [`PATIENCE`].

pub(crate) mod histogram;
mod metrics;
mod page;
pub(crate) mod rates;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue, X_CONTENT_TYPE_OPTIONS,
};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::{timeout, timeout_at};

use super::Shared;

/// Probes and scrapers need a handful.
const MAX_CONNECTIONS: usize = 64;
/// A connection lives no longer than this.
const PATIENCE: Duration = Duration::from_secs(30);

/// Storages in Python have so long to say how they are.
const LOOK: Duration = Duration::from_secs(1);

/// Answers requests, until the runtime ends.
pub(crate) async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok((socket, _)) = listener.accept().await else {
            // Out of file descriptors, most likely: leave the others theirs.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let Ok(place) = Arc::clone(&room).try_acquire_owned() else { continue };
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let shared = Arc::clone(&shared);
                async move { Ok::<_, Infallible>(answer(&shared, &request).await) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .max_buf_size(16 << 10)
                .serve_connection(TokioIo::new(socket), service);
            // How it ends matters to nobody: a probe that closed early, nonsense, time that ran out.
            let _ = timeout(PATIENCE, connection).await;
            drop(place);
        });
    }
}

/// Takes samples for the rates of the status page, until the runtime ends.
pub(crate) async fn watch_rates(shared: Arc<Shared>) {
    loop {
        for hub in &shared.hubs {
            if hub.capabilities.slow_calls {
                // `/readyz` tells what is found here; it asks nobody itself.
                let hub = Arc::clone(hub);
                drop(tokio::task::spawn_blocking(move || hub.look()));
            }
            hub.rates.sample(Instant::now(), rates::counters(&hub.stats));
        }
        tokio::time::sleep(rates::SAMPLE_EVERY).await;
    }
}

async fn answer(shared: &Arc<Shared>, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return text(StatusCode::METHOD_NOT_ALLOWED, "this listener only answers GET\n");
    }
    if matches!(request.uri().path(), "/metrics" | "/status.json" | "/") {
        look(shared).await;
    }
    match request.uri().path() {
        "/metrics" => match metrics::render(shared) {
            Ok(page) => respond(StatusCode::OK, metrics::CONTENT_TYPE, page),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
        },
        "/healthz" => text(StatusCode::OK, "ok\n"),
        "/readyz" => match readiness(shared) {
            Ok(()) => text(StatusCode::OK, "ready\n"),
            Err(reason) => text(StatusCode::SERVICE_UNAVAILABLE, &format!("{reason}\n")),
        },
        "/status.json" => respond(StatusCode::OK, "application/json", page::status(shared).to_string()),
        "/" => respond(StatusCode::OK, "text/html; charset=utf-8", page::html(shared)),
        _ => text(StatusCode::NOT_FOUND, "try /, /status.json, /metrics, /healthz or /readyz\n"),
    }
}

/// Lets the storages in Python say how they are, on worker threads. Who does not in time is shown as it was.
async fn look(shared: &Shared) {
    let until = tokio::time::Instant::now() + LOOK;
    let looks: Vec<_> = shared
        .hubs
        .iter()
        .filter(|hub| hub.capabilities.slow_calls)
        .map(|hub| {
            let hub = Arc::clone(hub);
            tokio::task::spawn_blocking(move || hub.look())
        })
        .collect();
    for look in looks {
        let _ = timeout_at(until, look).await;
    }
}

/// Whether clients can do what the configuration lets them.
fn readiness(shared: &Shared) -> Result<(), String> {
    if shared.is_stopping() {
        return Err("the server is stopping".into());
    }
    for hub in &shared.hubs {
        if let Some(reason) = hub.known_failure() {
            return Err(format!("storage {}: {reason}", hub.id));
        }
    }
    Ok(())
}

fn text(status: StatusCode, body: &str) -> Response<Full<Bytes>> {
    respond(status, "text/plain; charset=utf-8", body.to_owned())
}

fn respond(status: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    let policy = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'";
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(policy));
    response
}
