//! The import table of `docs/architecture.md` is true: no module of `src/` uses one above it, and only those that may use
//! tokio or pyo3 do.
//!
//! Features are walls at compile time; this test is the wall between modules that are compiled together.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// What one module may use: modules of this crate, and crates that not everyone may use.
#[derive(Debug, Default)]
struct Rule {
    modules: BTreeSet<String>,
    crates: BTreeSet<String>,
}

type Rules = BTreeMap<String, Rule>;

/// Crates that bind a layer to a runtime or an interpreter; everything else may be used by all.
const WALLED_CRATES: [&str; 7] =
    ["tokio", "tokio_util", "rustls", "tokio_rustls", "socket2", "pyo3", "pyo3_async_runtimes"];

/// Reads the table under "## Import table": `| module | may use | crates behind a wall |`.
fn parse_table(markdown: &str) -> Rules {
    let section = markdown.split("## Import table").nth(1).expect("docs/architecture.md has an import table");
    let section = section.split("\n## ").next().expect("split has a first part");
    let mut rules = Rules::new();
    let mut everything = Vec::new();
    for line in section.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let names =
            |cell: &str| cell.split('`').skip(1).step_by(2).map(str::to_owned).collect::<BTreeSet<_>>();
        let rule = Rule { modules: names(cells[1]), crates: names(cells[2]) };
        for module in names(cells[0]) {
            if cells[1] == "everything" {
                everything.push(module.clone());
            }
            rules.insert(module, Rule { modules: rule.modules.clone(), crates: rule.crates.clone() });
        }
    }
    let all: BTreeSet<String> = rules.keys().cloned().collect();
    for module in everything {
        rules.get_mut(&module).expect("just inserted").modules = all.clone();
    }
    rules
}

/// Source without comments and string contents, so that only code is judged.
fn code_only(source: &str) -> String {
    let bytes: Vec<char> = source.chars().collect();
    let (mut out, mut i) = (String::with_capacity(source.len()), 0);
    while i < bytes.len() {
        let rest = |n: usize| bytes.get(i + n).copied().unwrap_or('\0');
        match bytes[i] {
            '/' if rest(1) == '/' => {
                while i < bytes.len() && bytes[i] != '\n' {
                    i += 1;
                }
            }
            '/' if rest(1) == '*' => {
                while i < bytes.len() && !(bytes[i] == '*' && bytes.get(i + 1) == Some(&'/')) {
                    i += 1;
                }
                i += 2;
            }
            '\'' if rest(2) == '\'' => i += 3,
            '\'' if rest(1) == '\\' && rest(3) == '\'' => i += 4,
            'r' if (rest(1) == '"' || rest(1) == '#')
                && !out.ends_with(|c: char| c.is_alphanumeric() && c != 'b') =>
            {
                let hashes = bytes[i + 1..].iter().take_while(|c| **c == '#').count();
                i += 1 + hashes;
                if bytes.get(i) == Some(&'"') {
                    i += 1;
                    let end = |at: usize| {
                        bytes[at] == '"'
                            && bytes[at + 1..].iter().take(hashes).filter(|c| **c == '#').count() == hashes
                    };
                    while i < bytes.len() && !end(i) {
                        i += 1;
                    }
                    i += 1 + hashes;
                }
            }
            '"' => {
                i += 1;
                while i < bytes.len() && bytes[i] != '"' {
                    i += if bytes[i] == '\\' { 2 } else { 1 };
                }
                i += 1;
            }
            other => {
                out.push(other);
                i += 1;
            }
        }
    }
    out
}

/// First names of every path that starts at the crate's root: `crate::a::b`, `crate::{a::b, c}`, and `super::…` that climbs
/// to it from a file `depth` modules deep.
fn root_names(code: &str, depth: usize) -> BTreeSet<String> {
    let root_by_super = "super::".repeat(depth);
    let mut found = BTreeSet::new();
    for prefix in ["crate::", root_by_super.as_str()] {
        for (at, _) in code.match_indices(prefix) {
            let starts_word =
                code[..at].chars().next_back().is_none_or(|c| !c.is_alphanumeric() && c != '_' && c != ':');
            if !starts_word {
                continue;
            }
            let tail = &code[at + prefix.len()..];
            if let Some(group) = tail.strip_prefix('{') {
                found.extend(group_names(group));
            } else {
                found.insert(identifier(tail));
            }
        }
    }
    found
}

/// First names of the members of `{…}`, given the text after its opening brace.
fn group_names(group: &str) -> Vec<String> {
    let (mut level, mut start, mut names) = (0, 0, Vec::new());
    for (at, c) in group.char_indices() {
        match c {
            '{' => level += 1,
            '}' if level > 0 => level -= 1,
            ',' | '}' if level == 0 => {
                names.push(identifier(group[start..at].trim_start()));
                start = at + 1;
                if c == '}' {
                    break;
                }
            }
            _ => {}
        }
    }
    names
}

fn identifier(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

fn uses_crate(code: &str, name: &str) -> bool {
    code.match_indices(name).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        before.is_none_or(|c| !c.is_alphanumeric() && c != '_' && c != ':')
            && code[at + name.len()..].starts_with("::")
    })
}

/// What is wrong with the source of one file of `module`, `depth` modules below the root.
fn violations(module: &str, depth: usize, source: &str, rules: &Rules) -> Vec<String> {
    let Some(rule) = rules.get(module) else {
        return vec![format!("module `{module}` is missing in the import table")];
    };
    let code = code_only(source);
    let mut wrong: Vec<String> = root_names(&code, depth)
        .into_iter()
        .filter(|name| name != module && rules.contains_key(name) && !rule.modules.contains(name))
        .map(|name| format!("`{module}` may not use `{name}`"))
        .collect();
    wrong.extend(
        WALLED_CRATES
            .iter()
            .filter(|name| uses_crate(&code, name) && !rule.crates.contains(**name))
            .map(|name| format!("`{module}` may not use the crate `{name}`")),
    );
    wrong
}

fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).expect("src is readable") {
        let path = entry.expect("src is readable").path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn every_module_uses_only_those_below_it() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let table = fs::read_to_string(root.join("docs/architecture.md")).expect("docs/architecture.md");
    let rules = parse_table(&table);
    let mut files = Vec::new();
    sources(&root.join("src"), &mut files);
    let mut wrong = Vec::new();
    for file in &files {
        let relative = file.strip_prefix(root.join("src")).expect("below src");
        let mut path: Vec<String> =
            relative.with_extension("").iter().map(|part| part.to_string_lossy().into_owned()).collect();
        if path.last().is_some_and(|name| name == "mod") {
            path.pop();
        }
        if path == ["lib"] {
            continue;
        }
        let source = fs::read_to_string(file).expect("source is text");
        wrong.extend(
            violations(&path[0], path.len(), &source, &rules)
                .into_iter()
                .map(|what| format!("{}: {what}", relative.display())),
        );
    }
    assert!(files.len() > 10, "the test looked at the sources");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_table_has_no_cycle() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let rules =
        parse_table(&fs::read_to_string(root.join("docs/architecture.md")).expect("docs/architecture.md"));
    let mut placed: BTreeSet<String> = BTreeSet::new();
    while placed.len() < rules.len() {
        let next: Vec<String> = rules
            .iter()
            .filter(|(name, _)| !placed.contains(*name))
            .filter(|(name, rule)| rule.modules.iter().all(|used| used == *name || placed.contains(used)))
            .map(|(name, _)| name.clone())
            .collect();
        assert!(!next.is_empty(), "modules in a cycle: {:?}", rules.keys().filter(|k| !placed.contains(*k)));
        placed.extend(next);
    }
}

mod the_checker {
    use super::*;

    fn rules() -> Rules {
        parse_table(
            "## Import table\n| module | may use | crates |\n| --- | --- | --- |\n| `ids`, `limits` | nothing | |\n\
             | `wire` | `ids` | |\n| `net` | `wire` | `tokio` |\n| `python` | everything | `pyo3` |\n\n## Next\n| `x` | | |\n",
        )
    }

    #[test]
    fn reads_the_table() {
        let rules = rules();
        assert_eq!(rules.keys().collect::<Vec<_>>(), ["ids", "limits", "net", "python", "wire"]);
        assert!(rules["python"].modules.contains("net") && rules["net"].crates.contains("tokio"));
    }

    #[test]
    fn lets_allowed_imports_pass() {
        let source = concat!(
            "use crate::ids::Oid;\nuse crate::wire::Call; // crate::net::x\nlet a = \"crate::net\";",
            "let b = '\"'; let c = r#\"a \" crate::net\"#; let d = '\\''; /* crate::net */",
        );
        assert_eq!(violations("wire", 1, source, &rules()), Vec::<String>::new());
        assert_eq!(
            violations("python", 1, "use crate::{net::x, wire::{a, b}};", &rules()),
            Vec::<String>::new()
        );
    }

    #[test]
    fn finds_every_shape_of_a_forbidden_import() {
        for source in [
            "use crate::net::Address;",
            "use crate::{ids::Oid, net::{Address, Tls}};",
            "fn f() { crate::net::connect() }",
            "use super::net::Address;",
            "pub use crate::net;",
            "let b = '\"'; let c = r#\"a \" b\"#; use crate::net;",
        ] {
            assert_eq!(violations("wire", 1, source, &rules()), ["`wire` may not use `net`"], "{source}");
        }
        assert_eq!(
            violations("wire", 2, "use super::super::net::X;", &rules()),
            ["`wire` may not use `net`"]
        );
        assert_eq!(
            violations("wire", 1, "use tokio::io;", &rules()),
            ["`wire` may not use the crate `tokio`"]
        );
        assert_eq!(
            violations("net", 1, "pyo3::Python::attach(f)", &rules()),
            ["`net` may not use the crate `pyo3`"]
        );
        assert_eq!(violations("extra", 1, "", &rules()), ["module `extra` is missing in the import table"]);
    }
}
