"""Bases of models that answer the same questions; what a model answers beside them is in its own file."""

from scvi_lite.analysis import abundance, differential, expression, importance, latent, likelihood, minify, predictive
from scvi_lite.model import query
from scvi_lite.model.base import Model


class CellModel(Model):
    """Base of the models of single cells: how they are spread in latent space, and how likely they are."""

    get_aggregated_posterior = latent.get_aggregated_posterior
    get_elbo = likelihood.get_elbo
    get_reconstruction_error = likelihood.get_reconstruction_error
    get_marginal_ll = likelihood.get_marginal_ll
    differential_abundance = abundance.differential_abundance


class ExpressionModel(CellModel):
    """Base of the models of expression alone."""

    get_latent_representation = latent.get_latent_representation
    get_latent_library_size = latent.get_latent_library_size
    get_normalized_expression = expression.get_normalized_expression
    get_likelihood_parameters = predictive.get_likelihood_parameters
    posterior_predictive_sample = predictive.posterior_predictive_sample
    get_feature_correlation_matrix = predictive.get_feature_correlation_matrix
    differential_expression = differential.differential_expression


class ReferenceModel(ExpressionModel):
    """Base of those of them that queries are mapped onto, and whose data may be minified."""

    load_query_data = classmethod(query.load_query_data)
    prepare_query_anndata = staticmethod(query.prepare_query_anndata)
    get_importance_weights = importance.get_importance_weights
    minify_adata = minify.minify_adata
    minified_data_type = property(minify.minified)
