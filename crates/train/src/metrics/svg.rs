//! The loss curve as a picture.

use std::fmt::Write;

use crate::StepRecord;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 48.0;
const BOTTOM: f64 = 48.0;
/// More points than pixels only make the file large.
const MAX_POINTS: usize = 1000;

/// A self-contained SVG of the loss over the steps: every step's loss thin,
/// their running mean thick. The same records give the same bytes.
pub fn loss_curve_svg(title: &str, records: &[StepRecord]) -> String {
    let losses: Vec<f64> = records.iter().map(|record| record.loss).collect();
    let steps = (
        records.first().map_or(1.0, |record| record.step as f64),
        records.last().map_or(1.0, |record| record.step as f64),
    );
    let ticks = ticks(&losses);
    let frame = Frame {
        steps,
        losses: (ticks[0], ticks[ticks.len() - 1]),
    };

    let mut svg = format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif" font-size="12" fill="#444">
<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>
<text x="{LEFT}" y="28" font-size="16" fill="#111">{}</text>
"##,
        escape(title)
    );
    for tick in ticks {
        let y = frame.y(tick);
        let right = WIDTH - RIGHT;
        // Writing to a string cannot fail.
        let _ = writeln!(
            svg,
            r##"<path d="M{LEFT} {y:.1}H{right}" stroke="#ddd"/><text x="{:.1}" y="{:.1}" text-anchor="end">{tick:.2}</text>"##,
            LEFT - 8.0,
            y + 4.0
        );
    }
    for step in [steps.0, ((steps.0 + steps.1) / 2.0).round(), steps.1] {
        let _ = writeln!(
            svg,
            r#"<text x="{:.1}" y="{:.1}" text-anchor="middle">{step}</text>"#,
            frame.x(step),
            HEIGHT - BOTTOM + 20.0
        );
    }
    let _ = writeln!(
        svg,
        r#"<text x="{:.1}" y="{:.1}" text-anchor="middle">optimizer step</text>"#,
        (LEFT + WIDTH - RIGHT) / 2.0,
        HEIGHT - 10.0
    );
    svg += &frame.curve(records, &losses, r##"stroke="#9ec5e8" stroke-width="1""##);
    svg += &frame.curve(
        records,
        &running_mean(&losses),
        r##"stroke="#1f6fb2" stroke-width="2.5""##,
    );
    svg += "</svg>\n";
    svg
}

/// Where steps and losses lie on the picture.
struct Frame {
    steps: (f64, f64),
    losses: (f64, f64),
}

impl Frame {
    fn x(&self, step: f64) -> f64 {
        let (low, high) = self.steps;
        LEFT + (WIDTH - LEFT - RIGHT) * (step - low) / (high - low).max(1.0)
    }

    fn y(&self, loss: f64) -> f64 {
        let (low, high) = self.losses;
        HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (loss - low) / (high - low)
    }

    fn curve(&self, records: &[StepRecord], losses: &[f64], style: &str) -> String {
        let every = records.len().div_ceil(MAX_POINTS).max(1);
        let points: Vec<String> = records
            .iter()
            .zip(losses)
            .step_by(every)
            .map(|(record, &loss)| format!("{:.1},{:.1}", self.x(record.step as f64), self.y(loss)))
            .collect();
        format!(
            "<polyline fill=\"none\" {style} points=\"{}\"/>\n",
            points.join(" ")
        )
    }
}

/// Five round numbers around all losses.
fn ticks(losses: &[f64]) -> Vec<f64> {
    let low = losses.iter().copied().fold(f64::INFINITY, f64::min);
    let high = losses.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let (low, high) = if low <= high { (low, high) } else { (0.0, 1.0) };
    let rough = ((high - low) / 4.0).max(1e-3);
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .map(|factor| factor * power)
        .into_iter()
        .find(|&step| step >= rough)
        .unwrap_or(10.0 * power);
    let first = (low / step).floor();
    let last = (high / step).ceil().max(first + 1.0);
    (0..=(last - first) as u64)
        .map(|tick| (first + tick as f64) * step)
        .collect()
}

/// Exponential mean over about a twentieth of the run, unbiased at its start.
fn running_mean(losses: &[f64]) -> Vec<f64> {
    let decay = 1.0 - 1.0 / (losses.len() as f64 / 20.0).max(2.0);
    let (mut sum, mut weight) = (0.0, 0.0);
    losses
        .iter()
        .map(|loss| {
            sum = decay * sum + loss;
            weight = decay * weight + 1.0;
            sum / weight
        })
        .collect()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::records;

    #[test]
    fn the_picture_shows_both_curves_and_escapes_its_title() {
        let svg = loss_curve_svg("a < b", &records(50));
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert!(svg.contains("a &lt; b"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        assert_eq!(svg, loss_curve_svg("a < b", &records(50)));
    }

    #[test]
    fn few_and_many_records_draw_too() {
        for count in [0, 1, 5000] {
            let svg = loss_curve_svg("edge", &records(count));
            assert!(
                !svg.contains("NaN") && !svg.contains("inf"),
                "{count} records: {svg}"
            );
            assert!(svg.len() < 64 * 1024);
        }
    }

    #[test]
    fn ticks_are_round_and_surround_the_losses() {
        assert_eq!(ticks(&[0.3, 3.7]), [0.0, 1.0, 2.0, 3.0, 4.0]);
        assert_eq!(ticks(&[]), [0.0, 0.5, 1.0]);
        assert!(ticks(&[2.0, 2.0]).len() >= 2);
    }
}
