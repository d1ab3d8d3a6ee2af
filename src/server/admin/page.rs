//! The status of a server, as JSON and as a page for people. Both are made from the same value.

use std::fmt::Write;
use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};

use super::rates;
use crate::server::{Shared, status};

/// Seconds after which the page loads itself again.
const REFRESH: u32 = 5;

/// `{version, stopping, storages: {id: {…, clients: […], locks: […], pack}}}`.
pub(super) fn status(shared: &Arc<Shared>) -> Value {
    let storages: serde_json::Map<String, Value> = shared
        .hubs
        .iter()
        .map(|hub| {
            let mut storage = status::to_json(&status::value(hub));
            let latency = |histogram: &super::histogram::Histogram| {
                json!({"count": histogram.count(), "p50": histogram.quantile(0.5), "p99": histogram.quantile(0.99)})
            };
            if let Value::Object(fields) = &mut storage {
                fields.insert("name".into(), hub.name.as_str().into());
                let info = hub.known_info();
                fields.insert("objects".into(), info.length.into());
                fields.insert("size".into(), info.size.into());
                fields.insert("clients".into(), hub.clients().into_iter().map(client).collect());
                fields.insert("load_seconds".into(), latency(&hub.stats.load_seconds));
                fields.insert("finish_seconds".into(), latency(&hub.stats.finish_seconds));
                fields.insert("sync_seconds".into(), latency(&hub.stats.sync_seconds));
                let now = hub.rates.per_second(Instant::now(), rates::counters(&hub.stats));
                let rates: serde_json::Map<_, _> =
                    rates::NAMES.iter().zip(now).map(|(name, rate)| ((*name).into(), json!(rate))).collect();
                fields.insert("rates".into(), rates.into());
                fields.insert("write_failure".into(), hub.known_failure().into());
            }
            (hub.id.clone(), storage)
        })
        .collect();
    json!({"version": env!("CARGO_PKG_VERSION"), "stopping": shared.is_stopping(), "storages": storages})
}

fn client(client: crate::server::hub::ClientInfo) -> Value {
    json!({"peer": client.peer, "label": client.label, "read_only": client.read_only,
           "seconds": client.connected.as_secs(), "unread_bytes": client.unread})
}

/// The page. No script: it refreshes itself.
pub(super) fn html(shared: &Arc<Shared>) -> String {
    let status = status(shared);
    let mut page = format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\"><meta http-equiv=\"refresh\" content=\"{REFRESH}\">\
         <title>zeo-rs</title><style>{STYLE}</style></head><body><h1>zeo-rs {}</h1>",
        escaped(&status["version"])
    );
    if status["stopping"] == json!(true) {
        page.push_str("<p class=\"bad\">The server is stopping.</p>");
    }
    for (id, storage) in status["storages"].as_object().into_iter().flatten() {
        storage_section(&mut page, id, storage);
    }
    page.push_str("</body></html>\n");
    page
}

const STYLE: &str = "body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:64rem;padding:0 1rem;\
    color:#1c2024;background:#fff}h1{font-size:1.3rem}h2{font-size:1.1rem;margin-top:2rem}\
    table{border-collapse:collapse;width:100%;margin:.6rem 0 1.2rem}th,td{text-align:left;padding:.3rem .7rem;\
    border-bottom:1px solid #dde1e6}td.n{text-align:right;font-variant-numeric:tabular-nums}\
    dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(11rem,1fr));gap:.6rem}dt{color:#5b6570;font-size:.85rem}\
    dd{margin:0;font-size:1.15rem;font-variant-numeric:tabular-nums}.bad{color:#a40000;font-weight:600}\
    progress{width:100%}";

fn storage_section(page: &mut String, id: &str, storage: &Value) {
    let _ =
        write!(page, "<section><h2>Storage {} <small>{}</small></h2>", escape(id), escaped(&storage["name"]));
    if let Some(reason) = storage["write_failure"].as_str() {
        let _ = write!(page, "<p class=\"bad\">Takes no writes: {}</p>", escape(reason));
    }
    page.push_str("<dl>");
    let milliseconds = |seconds: &Value| format!("{:.2}", seconds.as_f64().unwrap_or(0.0) * 1e3);
    let rate = |name: &str| number(&storage["rates"][name]);
    let facts = [
        ("clients", storage["connections"].to_string()),
        ("loads / s", rate("loads")),
        ("commits / s", rate("commits")),
        ("stores / s", rate("stores")),
        ("conflicts / s", rate("conflicts")),
        ("bytes in / s", rate("bytes_received")),
        ("bytes out / s", rate("bytes_sent")),
        ("loads", storage["loads"].to_string()),
        ("load, p50 / p99", {
            let load = &storage["load_seconds"];
            format!("{} / {} ms", milliseconds(&load["p50"]), milliseconds(&load["p99"]))
        }),
        ("commits", storage["commits"].to_string()),
        ("commit groups", storage["commit_groups"].to_string()),
        ("finish, p50 / p99", {
            let finish = &storage["finish_seconds"];
            format!("{} / {} ms", milliseconds(&finish["p50"]), milliseconds(&finish["p99"]))
        }),
        ("sync, p50 / p99", {
            let sync = &storage["sync_seconds"];
            format!("{} / {} ms", milliseconds(&sync["p50"]), milliseconds(&sync["p99"]))
        }),
        ("conflicts", storage["conflicts"].to_string()),
        ("aborts", storage["aborts"].to_string()),
        ("votes waiting", storage["waiting"].to_string()),
        ("objects", storage["objects"].to_string()),
        ("bytes", storage["size"].to_string()),
        ("last transaction", escaped(&storage["last-transaction"])),
    ];
    for (name, value) in facts {
        let _ = write!(page, "<div><dt>{name}</dt><dd>{value}</dd></div>");
    }
    page.push_str("</dl>");
    if let Some(phase) = storage["pack"]["phase"].as_str() {
        let pack = &storage["pack"];
        let _ = write!(
            page,
            "<p>Packing: {} <progress max=\"{}\" value=\"{}\"></progress></p>",
            escape(phase),
            pack["bytes_total"],
            pack["bytes_done"]
        );
    }
    table(page, "Locks", &["client", "state", "objects", "seconds"], &storage["locks"], |lock| {
        let state = if lock["waiting"] == json!(true) { "waits" } else { "holds" };
        let objects = lock["objects"].as_u64().map_or("the whole storage".to_owned(), |n| n.to_string());
        vec![escaped(&lock["client"]), state.to_owned(), objects, number(&lock["seconds"])]
    });
    table(
        page,
        "Clients",
        &["address", "label", "may", "connected for (s)", "unread"],
        &storage["clients"],
        |client| {
            let may = if client["read_only"] == json!(true) { "read" } else { "read and write" };
            vec![
                escaped(&client["peer"]),
                escaped(&client["label"]),
                may.to_owned(),
                number(&client["seconds"]),
                number(&client["unread_bytes"]),
            ]
        },
    );
    page.push_str("</section>");
}

fn table(
    page: &mut String,
    title: &str,
    heads: &[&str],
    rows: &Value,
    cells: impl Fn(&Value) -> Vec<String>,
) {
    let Some(rows) = rows.as_array().filter(|rows| !rows.is_empty()) else { return };
    let _ = write!(page, "<h3>{title}</h3><table><thead><tr>");
    heads.iter().for_each(|head| page.push_str(&format!("<th>{head}</th>")));
    page.push_str("</tr></thead><tbody>");
    for row in rows {
        page.push_str("<tr>");
        cells(row).iter().for_each(|cell| page.push_str(&format!("<td>{cell}</td>")));
        page.push_str("</tr>");
    }
    page.push_str("</tbody></table>");
}

fn number(value: &Value) -> String {
    match value.as_f64() {
        Some(value) if value.fract() != 0.0 => format!("{value:.1}"),
        _ => value.to_string(),
    }
}

fn escaped(value: &Value) -> String {
    escape(value.as_str().unwrap_or_default())
}

/// Labels and names come from clients and files: nothing of them is markup.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_clients_say_is_no_markup() {
        let storage = json!({"name": "<Data.fs>", "clients": [{"peer": "p", "label": "<script>\"&", "read_only": false,
            "seconds": 3, "unread_bytes": 0}]});
        let mut page = String::new();
        storage_section(&mut page, "1<", &storage);
        assert!(page.contains("&lt;script&gt;&quot;&amp;"), "{page}");
        assert!(!page.contains("<script>") && !page.contains("<Data.fs>"));
    }
}
