"""Independent truths: formulas written again from the papers, in scalar or in 60-digit arithmetic."""
