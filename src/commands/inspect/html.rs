//! A data set as one HTML page without anything to load from elsewhere.

use std::fmt::{self, Write};

use super::dataset::{View, visible};

const STYLE: &str = "\
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;color:#1b1b1b;background:#fff}\
h1{font-size:1.3rem}h2{font-size:1rem;margin:1.5rem 0 .3rem}\
.found{border-left:4px solid #c60;padding-left:.6rem}\
table{border-collapse:collapse}td{padding:0 .6rem 0 0;font-variant-numeric:tabular-nums}\
.bar{display:inline-block;height:.8rem;background:#69b}\
.row{white-space:pre-wrap;overflow-wrap:anywhere;font:14px/1.6 ui-monospace,monospace;border:1px solid #ddd;border-radius:4px;padding:.6rem}\
.row span{color:#777}.row span:nth-child(even){background:#f6f6f6}\
.row .t{color:#064;background:#d8f3dc}.row .t:nth-child(even){background:#b7e4c7}\
.row .s{outline:1px dotted #888;border-radius:2px}";

/// The page.
pub fn page(view: &View) -> String {
    let mut page = String::new();
    write_page(&mut page, view).expect("a string takes everything");
    page
}

fn write_page(f: &mut impl Write, view: &View) -> fmt::Result {
    let title = escaped(&view.path.display().to_string());
    let dataset = view.dataset();
    writeln!(
        f,
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<title>{title}</title>"
    )?;
    writeln!(
        f,
        "<style>{STYLE}</style>\n<h1>{title}</h1>\n<p>{}</p>\n<ul>",
        escaped(&dataset.detected)
    )?;
    for line in view.summary() {
        writeln!(f, "<li>{}</li>", escaped(&line))?;
    }
    writeln!(f, "</ul>")?;
    for sentence in dataset.sentences() {
        writeln!(f, "<p class=\"found\">{}</p>", escaped(&sentence))?;
    }
    writeln!(f, "<h2>Rows by length in tokens</h2>\n<table>")?;
    for bucket in view.histogram() {
        let (from, to, rows) = (bucket.from, bucket.to, bucket.rows);
        let width = 20.0 * bucket.share;
        writeln!(
            f,
            "<tr><td>{from} to {to}<td><span class=\"bar\" style=\"width:{width:.2}rem\"></span> {rows}"
        )?;
    }
    writeln!(
        f,
        "</table>\n<p>Tokens that carry loss are green; special tokens have a dotted line around them.</p>"
    )?;
    for example in view.examples() {
        let (tokens, trained) = (example.input_ids.len(), example.target_count());
        write!(
            f,
            "<h2>line {}: {tokens} tokens, {trained} trained</h2>\n<div class=\"row\">",
            example.line
        )?;
        for piece in view.pieces(&example) {
            let class = match (piece.is_trained, piece.is_special) {
                (true, true) => " class=\"t s\"",
                (true, false) => " class=\"t\"",
                (false, true) => " class=\"s\"",
                (false, false) => "",
            };
            write!(f, "<span{class}>{}</span>", escaped(&visible(&piece.text)))?;
        }
        writeln!(f, "</div>")?;
    }
    writeln!(f, "</html>")
}

/// Text that means nothing to a browser.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            c => escaped.push(c),
        }
    }
    escaped
}
