//! Pictures of what was measured, in SVG.

use std::path::Path;

use anyhow::anyhow;
use plotters::prelude::*;
use qlora::store::AtomicFile;

use super::sampler::Samples;
use super::split::Split;

const SIZE: (u32, u32) = (720, 400);
const FONT: (&str, i32) = ("sans-serif", 16);
const COLOR: RGBColor = RGBColor(31, 119, 180);

type Drawn = Result<(), Box<dyn std::error::Error>>;

/// Memory beyond `before` over a step.
pub fn memory(path: &Path, samples: &Samples, before: u64) -> anyhow::Result<()> {
    let points: Vec<(f64, f64)> = samples
        .iter()
        .map(|(at, bytes)| (*at, bytes.saturating_sub(before) as f64 / 1e9))
        .collect();
    write(path, |svg| draw_memory(svg, &points))
}

/// Seconds of a step by what they were spent on.
pub fn split(path: &Path, split: &Split) -> anyhow::Result<()> {
    write(path, |svg| draw_split(svg, split))
}

fn write(path: &Path, draw: impl FnOnce(&mut String) -> Drawn) -> anyhow::Result<()> {
    let mut svg = String::new();
    draw(&mut svg).map_err(|error| anyhow!("{}: {error}", path.display()))?;
    AtomicFile::write(path, svg)?;
    Ok(())
}

fn draw_memory(svg: &mut String, points: &[(f64, f64)]) -> Drawn {
    let last = points.last().map_or(1.0, |(at, _)| *at);
    let most = points.iter().fold(0.0, |most: f64, (_, y)| most.max(*y));
    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .margin(16)
        .x_label_area_size(40)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..last, 0.0..most * 1.05)?;
    chart
        .configure_mesh()
        .x_desc("seconds of a step")
        .y_desc("memory, GB")
        .label_style(FONT)
        .axis_desc_style(FONT)
        .light_line_style(TRANSPARENT)
        .draw()?;
    chart.draw_series(LineSeries::new(
        points.iter().copied(),
        COLOR.stroke_width(2),
    ))?;
    area.present()?;
    Ok(())
}

fn draw_split(svg: &mut String, split: &Split) -> Drawn {
    let most = split.iter().fold(0.0, |most: f64, (_, y)| most.max(*y));
    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let rows = split.len() as f64;
    let mut chart = ChartBuilder::on(&area)
        .margin(16)
        .x_label_area_size(40)
        .build_cartesian_2d(0.0..most * 1.05, rows..0.0)?;
    chart
        .configure_mesh()
        .x_desc("seconds of a step")
        .disable_y_mesh()
        .disable_y_axis()
        .label_style(FONT)
        .axis_desc_style(FONT)
        .light_line_style(TRANSPARENT)
        .draw()?;
    for (row, (part, seconds)) in split.iter().enumerate() {
        let (top, row) = (row as f64 + 0.45, row as f64);
        chart.draw_series([Rectangle::new(
            [(0.0, top), (*seconds, row + 0.85)],
            COLOR.filled(),
        )])?;
        let label = format!("{part}: {seconds:.3} s");
        chart.draw_series([Text::new(label, (0.0, row + 0.1), FONT)])?;
    }
    area.present()?;
    Ok(())
}
