//! The loss of every step and of the held-out rows, as an SVG picture.

use std::path::Path;

use plotters::prelude::*;
use qlora::store::AtomicFile;

use super::report::Training;

const SIZE: (u32, u32) = (720, 400);
const FONT: (&str, i32) = ("sans-serif", 16);
const TRAIN_COLOR: RGBColor = RGBColor(31, 119, 180);
const HELDOUT_COLOR: RGBColor = RGBColor(214, 39, 40);

pub fn write(path: &Path, training: &Training) -> anyhow::Result<()> {
    let mut svg = String::new();
    draw(&mut svg, training).map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))?;
    AtomicFile::write(path, svg)?;
    Ok(())
}

fn draw(svg: &mut String, training: &Training) -> Result<(), Box<dyn std::error::Error>> {
    let steps = training.losses.len();
    let highest = training
        .losses
        .iter()
        .fold(0.0, |highest: f64, &(_, loss)| highest.max(loss));
    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .margin(16)
        .x_label_area_size(40)
        .y_label_area_size(48)
        .build_cartesian_2d(0..steps, 0.0..highest * 1.05)?;
    chart
        .configure_mesh()
        .x_desc("optimizer step")
        .y_desc("loss, nats per token")
        .label_style(FONT)
        .axis_desc_style(FONT)
        .light_line_style(TRANSPARENT)
        .draw()?;
    let curves = [
        ("training batch", &training.losses, TRAIN_COLOR),
        ("held-out rows", &training.eval_losses, HELDOUT_COLOR),
    ];
    for (label, points, color) in curves {
        chart
            .draw_series(LineSeries::new(
                points.iter().copied(),
                color.stroke_width(2),
            ))?
            .label(label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .background_style(WHITE)
        .border_style(BLACK.mix(0.3))
        .label_font(FONT)
        .draw()?;
    area.present()?;
    Ok(())
}
